"""What averages gradients and keeps ranks in step, on torch alone.

reducer: averages of gradients in buckets.  correction: those of inactive parameters, which are applied at once.
agreement: one check that ranks agree.  faults: time limits, and errors that say in which round a rank was lost.
replicas: all of it for processes that no engine serves, with forward_watch, which sees their forward passes and puts
torch's DDP to rest, and same_replicas, which compares them at the start.
"""
