// Collectives of processes of one machine; what Paddle calls them through is device_ext.h.
#pragma once

#include "paddle/phi/backends/device_ext.h"

namespace rehearsal {

void set_collectives(C_DeviceInterface* interface);

}  // namespace rehearsal
