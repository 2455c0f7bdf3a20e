"""GoLore's ReLoRA form: one factor of each adapter is a frozen basis, and the other one is merged at each refresh.

model   `ReLoRaModel`, which wraps a model
layer   `ReLoRaLinear`, one adapted layer
merge   merging the trained factor into its weight, and the next basis
"""
