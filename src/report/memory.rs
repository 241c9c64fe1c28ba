//! Main memory of this process, as the system counts it.

/// Peak resident memory so far in GiB; `None` where the system does not tell.
pub fn peak_gib() -> Option<f64> {
    status_gib("VmHWM:")
}

/// Has the system count the peak anew from what is resident now; whether it does that.
pub fn reset_peak() -> bool {
    cfg!(target_os = "linux") && std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Resident memory now in GiB; `None` where the system does not tell.
pub fn current_gib() -> Option<f64> {
    status_gib("VmRSS:")
}

/// Main memory in bytes that a process may have: the machine's, or what its control group is limited to;
/// `None` where the system does not tell.
pub fn total_bytes() -> Option<u64> {
    let total = machine_bytes("MemTotal:")?;
    // Version 2, in which a container sees its own group; "max" is no number.
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|limit| limit.trim().parse().ok());
    Some(limit.map_or(total, |limit: u64| limit.min(total)))
}

/// Main memory in bytes that is free without swapping; `None` where the system does not tell.
pub fn available_bytes() -> Option<u64> {
    machine_bytes("MemAvailable:")
}

fn machine_bytes(key: &str) -> Option<u64> {
    let gib = field_gib(&std::fs::read_to_string("/proc/meminfo").ok()?, key)?;
    Some((gib * f64::from(1 << 30)) as u64)
}

#[cfg(target_os = "linux")]
fn status_gib(key: &str) -> Option<f64> {
    field_gib(&std::fs::read_to_string("/proc/self/status").ok()?, key)
}

#[cfg(not(target_os = "linux"))]
fn status_gib(_key: &str) -> Option<f64> {
    None
}

/// Finds `key` among lines like `VmHWM:     5120 kB`; the kernel's kB is KiB.
fn field_gib(status: &str, key: &str) -> Option<f64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: f64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / (1024.0 * 1024.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_field() {
        let status = "Name:\tfewbit\nVmHWM:\t 3145728 kB\nVmRSS:\t 1048576 kB\n";
        assert_eq!(field_gib(status, "VmHWM:"), Some(3.0));
        assert_eq!(field_gib(status, "VmRSS:"), Some(1.0));
        assert_eq!(field_gib(status, "VmSwap:"), None);
        assert_eq!(field_gib("VmHWM: many kB", "VmHWM:"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_has_a_peak() {
        let (peak, now) = (peak_gib().unwrap(), current_gib().unwrap());
        assert!(peak > 0.0 && now > 0.0 && now < 1024.0, "{peak} {now}");
    }
}
