"""The room of techniques: one file each, one function that takes a `Case` and a seed and returns an `Outcome`. See docs/how-to."""
