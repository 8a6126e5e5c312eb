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

// A launcher, and the size of its params struct, to be checked against what Python fills in.
#define XSEP_ENTRY(name, Params)                                     \
  int emulate_##name(const Params* p, char* message, size_t bytes) { \
    return guarded([&] { name(*p, nullptr); }, message, bytes);      \
  }                                                                  \
  size_t emulate_sizeof_##name() { return sizeof(Params); }
