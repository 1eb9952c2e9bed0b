"""What a tier takes before it is run: memory, operations, hours and money of every stage, from its specs alone.

    workloads   what a spec's stage computes, in passes through which models
    passes      operations and bytes of a pass, by formula
    hardware    what it is computed on
    costs       stages on that hardware: GPUs, micro-batches, seconds, price; or why it cannot be
    placement   GPUs that a run gives a stage
    schedule    the graph of stages played through on a number of GPUs

Nothing here imports torch.
"""
