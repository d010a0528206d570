"""The talking-face world: a procedural renderer with exact ground truth, motion, speech, and a probe."""
