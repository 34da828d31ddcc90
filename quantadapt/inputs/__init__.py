"""Files that others wrote, read and validated once: records, configs, safetensors, patterns.

What comes from here has the types that it is said to have, sizes that can be, and names that stay
in their folder. It imports nothing heavy.
"""
