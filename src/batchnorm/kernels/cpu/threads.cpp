#include "threads.h"

#if defined(_WIN32)

namespace batchnorm {
bool has_pool() { return false; }
void parallel(int, void (*body)(void*, int, int), void* argument) { body(argument, 0, 1); }
}  // namespace batchnorm

#else

#include <dlfcn.h>
#include <pthread.h>

namespace batchnorm {
namespace {

// The runtime is looked up among what is loaded, and never linked: a second copy of libgomp in the
// process would be a second pool.
struct Pool {
  void (*run)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*index)() = nullptr;
  int (*count)() = nullptr;
  int (*inside)() = nullptr;

  Pool() {
    find("GOMP_parallel", run);
    find("omp_get_thread_num", index);
    find("omp_get_num_threads", count);
    find("omp_in_parallel", inside);
  }

  bool complete() const { return run && index && count && inside; }

  template <class Function>
  static void find(const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

const Pool& pool() {
  static const Pool found;
  return found;
}

bool forked = false;
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Task {
  void (*body)(void*, int, int);
  void* argument;
};

void enter(void* data) {
  const Task& task = *static_cast<const Task*>(data);
  task.body(task.argument, pool().index(), pool().count());
}

}  // namespace

bool has_pool() { return pool().complete() && !forked; }

void parallel(int threads, void (*body)(void*, int, int), void* argument) {
  if (threads < 2 || !has_pool() || pool().inside()) {
    body(argument, 0, 1);
    return;
  }
  Task task{body, argument};
  pool().run(enter, &task, static_cast<unsigned>(threads), 0);
}

}  // namespace batchnorm

#endif
