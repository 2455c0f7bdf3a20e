"""What averages gradients and keeps ranks in step, on torch alone.

reducer: averages of gradients in buckets.  agreement: one check that ranks agree.  faults: time limits, and errors that
say in which round a rank was lost.
"""
