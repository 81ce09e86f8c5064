"""The classical MIL sets (Musk, Fox, Tiger, Elephant) by their published protocol."""
