"""What the user's optimizer becomes when it is boosted.

registry  the table of casts by qualified class name, and the cast itself
galore    casts of galore_torch's and ColossalAI's GaLore
ratio     casts of the parameter-ratio form
fitness   whether an optimizer of another package can be sharded as it is
"""
