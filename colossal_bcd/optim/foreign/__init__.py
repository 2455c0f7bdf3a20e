"""What this package knows of optimizers of other packages, found by trying them on tiny tensors.

twin        a small copy of an optimizer on tensors of our own
trial       one step of a twin, and what it keeps where
contract    what may be wrapped, carried through a switch and saved, or is refused by name
elementwise whether an update of a slice is the slice of the update
bitsandbytes_states   8-bit states of bitsandbytes, by regions
"""
