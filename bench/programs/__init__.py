"""What the contenders run: each file is started as a process of its own, with one JSON argument."""
