"""Stand-alone scripts, each one side of a benchmark; nothing here imports rlhfscale."""
