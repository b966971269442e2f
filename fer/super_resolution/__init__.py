"""Super-resolution: interpolation, DIC, Swin2SR, and how well they restore images."""
