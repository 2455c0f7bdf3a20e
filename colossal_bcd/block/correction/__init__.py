"""BREAD's corrections: cheap updates of the inactive blocks.

rules         SGD, sign, momentum and Lion updates of one parameter
by_optimizer  a correction by an optimizer of this package
correction    what corrections keep for a parameter, the update itself, and who brings the gradients
"""
