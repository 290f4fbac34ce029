// Stands in for the CUDA runtime API.
#pragma once

#include "cuda_runtime.h"
