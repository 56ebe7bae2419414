// Stands in for the CUDA toolkit's header.
#pragma once

#include "emulator.h"
