"""Several growth methods under one budget: what each gives, costs and saves."""
