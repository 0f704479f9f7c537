// Memory for large outputs that is kept when an output ends, and handed out again: the first touch of
// fresh pages takes longer than to normalize them.
#pragma once

#include <cstddef>

namespace batchnorm {

struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// A block of at least `bytes`, kept or fresh; data is null where there is none to be had.
Block take(std::size_t bytes);

// Keep it for the next one, or return it to the system where more than the limit would be kept. With
// what is in use, what is kept is never more than the most that ever was in use.
void give_back(Block block);

// Keep at most so many bytes. None: nothing is handed out either.
void keep_at_most(std::size_t bytes);
std::size_t most_kept();
std::size_t kept();

}  // namespace batchnorm
