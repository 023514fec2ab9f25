// Element types as the launch functions of all ops name them.
#pragma once

namespace mtfast {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace mtfast
