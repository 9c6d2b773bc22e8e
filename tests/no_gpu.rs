//! The CUDA driver where there may be none: typed errors, never a panic. It passes on a machine with devices, too.

use railhop::device::cuda::{self, CudaDriver};
use railhop::error::DeviceError;

/// What a machine may lack.
fn is_absence(error: &DeviceError) -> bool {
    use DeviceError::{NoCompiler, NoDevice, NoDriver, OldDriver, Unsupported};
    matches!(error, NoDriver(_) | OldDriver { .. } | NoDevice { .. } | NoCompiler(_) | Unsupported { .. })
}

#[test]
fn devices_are_named_or_missing() {
    match cuda::devices() {
        Ok(names) => assert!(names.iter().all(|name| !name.is_empty())),
        Err(error) => assert!(is_absence(&error), "{error}"),
    }
}

#[test]
fn devices_are_described_or_missing() {
    let names = cuda::survey().map(|devices| devices.into_iter().map(|device| device.name).collect());
    assert_eq!(names, cuda::devices());
}

#[test]
fn a_device_opens_or_is_missing() {
    // Twice: what the first attempt has left must not hurt the second.
    for _ in 0..2 {
        match CudaDriver::open(0) {
            Ok(driver) => assert!(railhop::device::Driver::limits(&*driver).sms > 0),
            Err(error) => assert!(is_absence(&error), "{error}"),
        }
    }
}

#[test]
fn a_device_that_can_not_be_is_missing() {
    let count = cuda::devices().map(|names| names.len());
    for ordinal in [1_000, usize::MAX] {
        let error = CudaDriver::open(ordinal).err().expect("nobody has so many");
        match &count {
            Ok(count) => assert_eq!(error, DeviceError::NoDevice { device: ordinal, count: *count }),
            Err(missing) => assert_eq!(error, *missing),
        }
    }
}

#[test]
fn without_nvrtc_the_kernels_need_a_compiler() {
    match cuda::compile("sm_90a") {
        Ok(cubin) => assert!(cubin.starts_with(b"\x7fELF")),
        Err(error) => assert!(matches!(error, DeviceError::NoCompiler(_)), "{error}"),
    }
}

#[test]
fn an_unknown_target_is_refused() {
    for target in ["sm_1", "sm_90a\0"] {
        let error = cuda::compile(target).expect_err("there is no such target");
        assert!(matches!(error, DeviceError::NoCompiler(_) | DeviceError::Compile { .. }), "{error}");
    }
}

#[cfg(target_os = "linux")]
mod descriptors {
    use std::fs::File;
    use std::io::{ErrorKind, Read, Seek, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::{Duration, Instant};

    use railhop::fabric::descriptor::{recv_fd, send_fd};

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn file(content: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file
    }

    fn content(mut file: File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn arrive_in_order_with_their_labels() {
        let (here, there) = UnixStream::pair().unwrap();
        let sender = thread::spawn(move || {
            for label in 0..100 {
                send_fd(&here, file(&format!("file {label}")).as_fd(), label).unwrap();
            }
        });
        for label in 0..100 {
            let (descriptor, found) = recv_fd(&there, soon()).unwrap();
            assert_eq!(found, label);
            assert_eq!(content(File::from(descriptor)), format!("file {label}"));
        }
        sender.join().unwrap();
        // All has been sent, and the other end is closed.
        assert_eq!(recv_fd(&there, soon()).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn stay_open_where_they_come_from() {
        let (here, there) = UnixStream::pair().unwrap();
        let sent = file("still here");
        send_fd(&here, sent.as_fd(), u64::MAX).unwrap();
        let (descriptor, label) = recv_fd(&there, soon()).unwrap();
        drop(descriptor);
        assert_eq!((content(sent).as_str(), label), ("still here", u64::MAX));
    }

    #[test]
    fn are_waited_for_until_the_deadline() {
        let (_here, there) = UnixStream::pair().unwrap();
        let began = Instant::now();
        let error = recv_fd(&there, began + Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(began.elapsed() >= Duration::from_millis(50));
        // A deadline that has passed is no different.
        assert_eq!(recv_fd(&there, began).unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn bytes_alone_are_refused() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&7u64.to_le_bytes()).unwrap();
        assert_eq!(recv_fd(&there, soon()).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn can_not_be_sent_to_nobody() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        assert_eq!(send_fd(&here, file("").as_fd(), 0).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }
}
