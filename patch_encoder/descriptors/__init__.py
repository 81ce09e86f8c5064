"""Classical tile descriptors that need no network: stain and texture statistics, mean colour."""
