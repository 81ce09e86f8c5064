"""The page on region features: slides like this one, and the prototypes of each slide."""
