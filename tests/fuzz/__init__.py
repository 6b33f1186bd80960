"""What reads strangers' bytes, under libFuzzer (atheris): `make fuzz`.

Each module of `targets` is one target: `one(data)` raises only on a real finding,
`seeds()` are the bytes to begin with, and `WORDS`, if it has them, are pieces of
its language. `tests/unit/test_fuzz.py` runs every target without the engine.
"""
