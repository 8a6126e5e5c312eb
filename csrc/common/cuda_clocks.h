// What ways of running a problem are weighed by, in clocks of an H200 (1.755 GHz, 132 multiprocessors).
#pragma once

namespace xsep::cuda {

inline constexpr double kMemoryBytesAClock = 18.6;  // a multiprocessor's share of a copy's 4.3 TB/s
inline constexpr double kL2BytesAClock = 32.0;      // and of what L2 delivers
inline constexpr double kLaunchClocks = 4400.0;  // 2.5 us between two kernels: the tail of one, the start of the next
inline constexpr double kMmaSyncMultiplyAdds = 1340.0;  // of 16-bit values, a multiprocessor's in mma.sync
inline constexpr double kGemmMultiplyAdds = 1700.0;     // and in PyTorch's products

}  // namespace xsep::cuda
