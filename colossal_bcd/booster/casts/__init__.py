"""What the user's optimizer becomes when it is boosted.

registry  the table of casts by qualified class name, and the cast itself
"""
