"""A package of Lightning's, for the samplers in it; torch does the rest."""
