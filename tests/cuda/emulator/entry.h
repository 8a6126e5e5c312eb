#pragma once

#include <cstddef>
#include <cstdio>
#include <exception>

#include "emulator.h"

// Runs body; on an exception puts its words into message and returns 1.
template <class Body>
int guarded(const Body& body, char* message, size_t bytes) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(message, bytes, "%s", e.what());
    return 1;
  }
}

extern "C" inline __attribute__((used, visibility("default"))) void emulate_seed(unsigned seed) {
  emulator::set_seed(seed);
}
