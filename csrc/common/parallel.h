// A fixed split of work over threads: the parts depend on their number only, never on timing, so results repeat.
#pragma once

#include <cstdint>

namespace pyrewrite {

// Calls run(body, part) for part = 0 .. parts - 1, on up to `parts` threads, the caller's among them. Parts must not
// wait for each other: there may be fewer threads.
void run_parts(int parts, void (*run)(const void* body, int part), const void* body);

// Calls body(part) for part = 0 .. parts - 1 as `run_parts` does. `body` must not throw.
template <typename Body>
void parallel_parts(int parts, const Body& body) {
  run_parts(parts, [](const void* it, int part) { (*static_cast<const Body*>(it))(part); }, &body);
}

// First item of `part` when `count` items are spread over `parts` as evenly as can be.
inline std::int64_t part_begin(std::int64_t count, int parts, int part) {
  return count / parts * part + (count % parts < part ? count % parts : part);
}

}  // namespace pyrewrite
