"""The arithmetic of growth: the tensor-ring operator and the maps between sizes."""
