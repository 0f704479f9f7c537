// The OpenMP pool that torch already runs. A pool of our own would fight with it for the cores.
#pragma once

namespace batchnorm {

// Run body(argument, index, count) on `count` threads, at most `threads`; serially where torch has
// no pool, inside a parallel region, and in a forked child, whose pool did not come along.
void parallel(int threads, void (*body)(void* argument, int index, int count), void* argument);

// Whether there is a pool.
bool has_pool();

}  // namespace batchnorm
