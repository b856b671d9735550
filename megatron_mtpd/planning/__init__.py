"""What a run will need, from its flags alone: parameters, memory by rank, floating-point operations, stages, time."""
