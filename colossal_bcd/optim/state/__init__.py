"""How the state of an optimizer is declared, stored and filed.

spec       `StateSpec`, `State`: the one declaration that allocation, estimate and checkpoint read
storage    the weights and the state of one update, as the rule sees them and as they are stored
stack      parameters of equal layout whose state shares one storage, so that one update serves all
quantized  8-bit moments with a scale for every chunk of 256 values, and from full ones back to them bit for bit
rounding   stochastic rounding of low-precision weights by counters
filed      state as it is in files: full tensors, whatever the mesh
whole      state of DTensors as DTensors of whole shapes, for state dicts
"""
