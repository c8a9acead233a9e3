#include "common/parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace pyrewrite {
namespace {

struct Work {
  void (*run)(const void*, int);
  const void* body;
  int parts;
  std::atomic<int> next{0};

  void take() {
    for (int part = next++; part < parts; part = next++) run(body, part);
  }
};

// void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags): how GCC's OpenMP starts a
// team, and what LLVM's and Intel's runtimes offer under the same name.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that torch uses, or null. After an operator of torch its threads look out for more work for some
// milliseconds, on all processors: threads of our own would have to share these with them, and take as long to start
// as a small map takes to convolve.
#if defined(__linux__)
const pid_t process = getpid();  // when this was loaded: the team may be older than our first call
#endif

Team torch_team() {
#if defined(__linux__)
  static const Team team = []() -> Team {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<Team>(dlsym(torch, "GOMP_parallel")) : nullptr;
  }();
  return getpid() == process ? team : nullptr;  // a fork has none of the team's threads
#else
  return nullptr;
#endif
}

}  // namespace

void run_parts(int parts, void (*run)(const void* body, int part), const void* body) {
  Work work{run, body, parts};
  if (parts <= 1) return work.take();
  if (const Team team = torch_team())
    return team([](void* it) { static_cast<Work*>(it)->take(); }, &work, static_cast<unsigned>(parts), 0);
  std::vector<std::thread> threads;
  try {
    threads.reserve(parts - 1);
    for (int n = 1; n < parts; ++n) threads.emplace_back([&work] { work.take(); });
  } catch (const std::system_error&) {  // the system gives no more threads
  }
  work.take();
  for (auto& thread : threads) thread.join();
}

}  // namespace pyrewrite
