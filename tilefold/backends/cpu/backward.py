def delta(spec):
    raise NotImplementedError


dq = dkv = fused = delta
