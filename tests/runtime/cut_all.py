"""ZeRO 3 that cuts whatever it can: else DeepSpeed keeps whole what is as small as the models of tests."""

CUT_ALL = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
