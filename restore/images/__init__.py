"""Image files and pixels: reading, writing, masks, blind estimates, resampling, comparison grids."""
