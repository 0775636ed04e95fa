"""The data of the model "tiny": openly licensed drawings with captions, as training shards."""
