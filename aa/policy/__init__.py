"""The policy: files, rules, and the one engine that decides, explains and checks with them."""
