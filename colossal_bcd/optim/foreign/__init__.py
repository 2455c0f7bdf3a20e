"""What this package knows of optimizers of other packages, found by trying them on tiny tensors.

twin                  a small copy of an optimizer on tensors of our own, its steps and what it keeps
contract              what may be wrapped, carried through a switch and saved, or is refused by name, and
                      whether an update of a slice is the slice of the update
elementwise           those that need no trial to be given parts of tensors
bitsandbytes_states   8-bit states of bitsandbytes, by regions
"""
