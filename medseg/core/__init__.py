"""Grid, Volume, LabelMap, LabelSet and resample: what everything here speaks."""
