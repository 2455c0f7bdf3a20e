"""What averages gradients, has the masters and writes weights back, on torch alone; a host such as booster/ drives it.

From backward to the step
    reducer        averages of gradients in buckets, from hooks on
    sinks          the other sink of averages: corrections of inactive parameters, applied at once
    transport      whether gradients travel whole, stay, or travel in low rank
    masters        this rank's share of what trains, and the gather of weights from it
    norm           one norm of gradients over all axes, and norms of blocks
    newcomers      weights that were thawed or added, and those that no batch uses
What keeps ranks together
    fitness        whether an optimizer of another package is right on parts of tensors
    agreement      one check that ranks have the same
    failures       time limits, errors that say in which round a rank was lost, steps that were not finite
    config         what a host decides
Without a host
    replicas       all of it for processes that train replicas: torch's DDP, accelerate, plain loops
    forward_watch  sees their forward passes, and puts torch's DDP to rest
"""
