"""The `aasm` command. One module per noun; `main` puts them together."""
