"One process fails, the others wait for it: torchrun ends them all"
from blocks.train.distributed import this_world

world = this_world()
if not world.first: raise ValueError('on purpose')
world.barrier()
print('never reached', flush=True)
