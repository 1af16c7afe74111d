"""Files and pixels: reading, writing, resampling, labelled pictures."""
