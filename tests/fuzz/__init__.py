"""What reads strangers' bytes, under libFuzzer (atheris): `make fuzz`.

Each module of `targets` is one target: `one(data)` raises only on a real finding,
`seeds()` are the bytes to begin with, and `WORDS`, if it has them, are pieces of
its language; `mutate`, if it has it, changes an input and keeps its shape. `python -m tests.fuzz.replay`
runs a target on files, and the unit tests run all of them, without the engine.
"""
