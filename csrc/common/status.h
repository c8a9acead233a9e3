// What a kernel's host side returns: nothing in csrc/ exits, and nothing but bindings.cpp throws.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace pyrewrite {

struct Status {
  enum Kind { kOk, kInvalid, kUnsupported, kDevice };
  Kind kind = kOk;
  char message[512] = "";

  bool ok() const { return kind == kOk; }

#if defined(__GNUC__)
  __attribute__((format(printf, 2, 3)))
#endif
  static Status error(Kind kind, const char* format, ...) {
    Status status;
    status.kind = kind;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(status.message, sizeof(status.message), format, arguments);
    va_end(arguments);
    return status;
  }
};

}  // namespace pyrewrite
