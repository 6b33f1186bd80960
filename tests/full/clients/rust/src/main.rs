//! fetch HOST PATH: asks a host over TLS, trusting what the system trusts, and prints the status line.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let (host, path) = (&arguments[1], &arguments[2]);
    let mut roots = rustls::RootCertStore::empty();
    for found in rustls_native_certs::load_native_certs().expect("the system's store") {
        // one that cannot be read is somebody else's
        let _ = roots.add(&rustls::Certificate(found.0));
    }
    let config = rustls::ClientConfig::builder()
        .with_safe_defaults()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = host.as_str().try_into().expect("a host name");
    let mut session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = TcpStream::connect((host.as_str(), 443)).unwrap();
    let mut stream = rustls::Stream::new(&mut session, &mut socket);
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer);
    println!("{}", text.lines().next().unwrap_or(""));
    assert!(text.starts_with("HTTP/1.1 200"));
}
