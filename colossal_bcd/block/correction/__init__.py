"""BREAD's corrections: cheap updates of the inactive blocks.

rules         SGD, sign, momentum and Lion updates of one parameter
by_optimizer  a correction by an optimizer of this package
state         what corrections keep for a parameter, and the update itself
correction    the options of a correction, and the gradients of inactive parameters as they come
"""
