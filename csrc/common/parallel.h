// A fixed split of work over threads: the parts depend on their number only, never on timing, so results repeat.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace pyrewrite {

// Calls body(part) for part = 0 .. parts - 1, each on its own thread and the last on the caller's. Where the system
// gives no more threads, the caller does the rest. `body` must not throw.
template <typename Body>
void parallel_parts(int parts, const Body& body) {
  std::vector<std::thread> threads;
  int started = 0;
  try {
    threads.reserve(parts > 1 ? parts - 1 : 0);
    for (; started < parts - 1; ++started) threads.emplace_back([&body, part = started] { body(part); });
  } catch (const std::system_error&) {
  }
  for (int part = started; part < parts; ++part) body(part);
  for (auto& thread : threads) thread.join();
}

// First item of `part` when `count` items are spread over `parts` as evenly as can be.
inline std::int64_t part_begin(std::int64_t count, int parts, int part) {
  return count / parts * part + (count % parts < part ? count % parts : part);
}

}  // namespace pyrewrite
