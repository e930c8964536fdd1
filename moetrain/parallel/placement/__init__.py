"""Where computable copies of experts exist: plans, planners and the cost model. Pure integer arithmetic on numpy
arrays: no process group, no device, so all ranks that start from the same counts reach the same plan."""
