#include "memory.h"

#if defined(_WIN32)

namespace batchnorm {
Block take(std::size_t) { return {}; }
void give_back(Block) {}
void keep_at_most(std::size_t) {}
std::size_t most_kept() { return 0; }
std::size_t kept() { return 0; }
}  // namespace batchnorm

#else

#include <pthread.h>
#include <sys/mman.h>

#include <mutex>
#include <vector>

namespace batchnorm {
namespace {

constexpr std::size_t PAGE = std::size_t{2} << 20;  // a huge one

void to_system(const Block& block) { munmap(block.data, block.bytes); }

Block from_system(std::size_t bytes) {
  // a page more, so that one that begins a huge page can be cut out
  const std::size_t mapped = bytes + PAGE;
  void* const whole = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) return {};
  char* const start = static_cast<char*>(whole);
  const std::size_t before = (PAGE - reinterpret_cast<std::size_t>(start) % PAGE) % PAGE;
  if (before > 0) munmap(start, before);
  munmap(start + before + bytes, PAGE - before);
  Block block{start + before, bytes};
#if defined(MADV_HUGEPAGE)
  madvise(block.data, block.bytes, MADV_HUGEPAGE);
#endif
  return block;
}

// The system may take an idle block's pages when it is short of memory.
void lend_to_system(const Block& block) {
#if defined(MADV_FREE)
  madvise(block.data, block.bytes, MADV_FREE);
#endif
}

struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;  // the oldest first
  std::size_t bytes = 0, limit = 0;
  std::size_t used = 0, most_used = 0;  // by tensors

  void use(std::size_t more) {
    used += more;
    if (used > most_used) most_used = used;
  }

  // The smallest that is large enough and wastes no more than an eighth.
  Block find(std::size_t wanted) {
    std::size_t best = blocks.size();
    for (std::size_t i = blocks.size(); i-- > 0;) {
      const std::size_t there = blocks[i].bytes;
      if (there < wanted || there > wanted + wanted / 8) continue;
      if (best == blocks.size() || there < blocks[best].bytes) best = i;
    }
    return best == blocks.size() ? Block{} : remove(best);
  }

  Block remove(std::size_t index) {
    const Block block = blocks[index];
    blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(index));
    bytes -= block.bytes;
    return block;
  }

  void shrink_to(std::size_t most) {
    while (bytes > most) to_system(remove(0));
  }
};

// Never destroyed: a tensor may end after the statics of this library.
Kept& pool() {
  static Kept* const only = new Kept;
  return *only;
}

// No thread holds the lock while the process forks. What is idle is the parent's: the child would copy
// every page that it touches.
[[maybe_unused]] const int watched = pthread_atfork(
    [] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
    [] {
      pool().shrink_to(0);
      pool().mutex.unlock();
    });

}  // namespace

Block take(std::size_t bytes) {
  bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    const Block block = pool().find(bytes);
    pool().use(block.data ? block.bytes : bytes);
    if (block.data) return block;
    // blocks of sizes that nobody asks for any more make room for this one
    pool().shrink_to(pool().most_used - pool().used);
  }
  Block fresh = from_system(bytes);
  if (fresh.data) return fresh;
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().shrink_to(0);
  }
  fresh = from_system(bytes);
  if (!fresh.data) {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().used -= bytes;
  }
  return fresh;
}

void give_back(Block block) {
  if (block.bytes <= most_kept()) lend_to_system(block);
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().used -= block.bytes;
    if (block.bytes <= pool().limit) {
      pool().shrink_to(pool().limit - block.bytes);
      pool().blocks.push_back(block);
      pool().bytes += block.bytes;
      return;
    }
  }
  to_system(block);
}

void keep_at_most(std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().limit = bytes;
  pool().shrink_to(bytes);
}

std::size_t most_kept() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().limit;
}

std::size_t kept() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().bytes;
}

}  // namespace batchnorm

#endif
