"""The kernel layer: loads the BPF objects, keeps them attached, and turns what they tell into reports."""
